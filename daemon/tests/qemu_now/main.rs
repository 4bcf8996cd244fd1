//! What moves is the guest of now, not the one that was launched.

#[path = "../common/mod.rs"]
mod common;
mod hangs;
mod machine;
mod memory;
mod others;
mod room;
mod scene;
mod standing;
mod state;
