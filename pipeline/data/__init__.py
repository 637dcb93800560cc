"""From records and pictures to shards of token ids: layouts, chat templates, quarantine."""
