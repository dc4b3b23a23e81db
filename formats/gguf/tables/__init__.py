"""What llama.cpp calls each family, its sizes and its tensors."""
