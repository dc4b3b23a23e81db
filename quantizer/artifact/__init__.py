"""The artifact: the folder of integers and floats that every exported file is written from."""
