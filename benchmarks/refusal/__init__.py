"""Does a flexible loss help to learn refusals?"""
