"""Other trainers' configuration files: the callback, attached by a section of Axolotl's, LLaMA-Factory's or TRL's."""
