"""What is offered to a server, and what came back."""
