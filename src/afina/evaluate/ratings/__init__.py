"""People's judgement: answers rated blind, kept, counted, and handed on as preferences."""
