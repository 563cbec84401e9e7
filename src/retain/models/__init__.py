"""The model protocol and the models that fulfil it: any Hugging Face image-text-to-text model, and the pocket."""
