TRIGGERS = {
    "self_questioning": "\n\nWait, does it seem right?",
    "self_correction": "\n\nWait, there might be a mistake",
    "self_verification": "\n\nWait, let's double check",
}
