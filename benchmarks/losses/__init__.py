"""What does the flexible loss contain, and does it help where labels are wrong?"""
