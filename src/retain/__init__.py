"""retain: tune a multimodal language model on one task after another and keep what it already knew."""

from retain.types import Conflict, Example, Message, RetainError

__version__ = "0.1.0"
__all__ = ["Conflict", "Example", "Message", "RetainError", "__version__"]
