"""Measurements on finished runs (`retain analyse …`): read a run folder, compute, print, write beside it."""
