"""How files hold weights: each way of publishing them, read into weights and written from them."""
