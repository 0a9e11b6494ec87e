"""The scheduler models of vLLM and SGLang, the time of their steps, and the records that they give."""
