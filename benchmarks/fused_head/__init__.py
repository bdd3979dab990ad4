"""How much memory and time does the fused head take?"""
