"""Ask for a rate, get it?"""
