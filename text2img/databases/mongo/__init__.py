"""Prompts and results in MongoDB 4.4 or later, through the Protocols of text2img.databases.

Only this package uses pymongo and BSON; it is imported when a MongoDB URL is opened.
"""
