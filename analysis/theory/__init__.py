"""What is predicted in closed form: memory, critical rates, congestion and flow control."""
