"""Generation: the engines, chat templates, and text as it becomes certain."""
