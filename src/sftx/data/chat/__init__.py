"""From a conversation to text with targets: a chat template is rendered, and its turns are found in
the text.
"""
