"""Models of other libraries as fastseq models: Keras, fairseq, OpenNMT-py, JoeyNMT."""
