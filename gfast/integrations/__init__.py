"""gfast in the trainers of other libraries: transformers, TRL, open-unlearning."""
