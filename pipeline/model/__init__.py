"""The models, one file per `model.kind`, and their initial weights."""
