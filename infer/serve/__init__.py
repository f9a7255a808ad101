"""A server with OpenAI's chat completions for videos and images: `python -m infer.serve`. See docs/serving.md."""
