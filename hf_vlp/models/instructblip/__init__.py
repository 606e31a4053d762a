"""InstructBLIP (arXiv 2305.06500): a Q-Former that reads the instruction, before a frozen language model."""
