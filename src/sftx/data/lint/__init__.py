"""What is wrong or doubtful in data, before it is trained on."""
