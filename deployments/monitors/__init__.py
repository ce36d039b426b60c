"""What an executor and Control report of themselves."""
