"""How is a trait trained into one dial, and how far can the dial be turned?"""
