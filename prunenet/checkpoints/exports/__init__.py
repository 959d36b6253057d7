"""Writes checkpoints in the forms of other engines.

choices.py             what an exported file may hold
gguf.py                one GGUF file, compared with the model where llama.cpp is installed
gguf_form.py           a model in the words of llama.cpp: architecture, hyperparameters, tensors
gguf_gemma.py          what is Gemma's own there
gguf_tokenizer.py      the same of a tokenizer
gguf_sentencepiece.py  of SentencePiece's kind: scores and blanks
nemotron.py            the form of Nemotron-NAS; configuration_nemotron_nas.py travels beside it
llama_cpp.py           reads a GGUF file by llama.cpp, and compares what it computes
"""
