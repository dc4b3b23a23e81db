"""What a person reads afterwards: report.html and the model card."""
