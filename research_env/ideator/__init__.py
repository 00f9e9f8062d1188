"""Where ideas come from: mutation operators offline, language models when one is at hand."""
