//! `sapwood boot`: what it needs of the disks.

#[cfg_attr(not(test), expect(dead_code, reason = "the command comes with the machine"))]
mod reader;
