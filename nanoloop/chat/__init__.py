"""
Chat: answers to conversations, for the terminal and for a server.

    rows.py          a KV cache whose rows serve texts that come and go
    conversation.py  from turns to the ids of a prompt that fits in view
    answer.py        an answer while it is generated, and its text in pieces
    engine.py        many answers in one batch
    requests.py      requests of the OpenAI-compatible server, checked
    server.py        the server; its page is nanoloop/chat.html
    guard.py         who may ask it
    listen.py        the port, and how it ends
    terminal.py      the conversation and the commands in a terminal
    settings.py      how an answer is generated
    chat_model.py    a model, its tokenizer and the form of its conversations
"""
