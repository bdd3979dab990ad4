"""What do the server's parts cost, each alone?"""
