"""Loss and scores per task on a fixed probe set, and the text generation that the scores need."""
