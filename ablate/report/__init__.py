"""A study folder turned into what people read: page, pictures, tables, export, verify."""
