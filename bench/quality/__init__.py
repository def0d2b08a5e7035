"""What a quantisation costs: in the weights, in the layers' outputs, and in what the model does."""
