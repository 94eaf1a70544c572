"""What a run was like: collected as it goes, then shown as text, as a page, or beside another."""
