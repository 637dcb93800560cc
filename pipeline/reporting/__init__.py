"""What people read: results.json, figures, pages, model cards, timelines."""
