//! Guests in stock QEMU that cannot move are refused beforehand, by real QEMUs and daemons: with the reason, with
//! the argument or key to change, and without harm to the guest, which runs on and moves once that is changed.
//!
//! The guests are firmware that finds nothing to boot: their QEMUs start in a fraction of a second, and nothing that
//! is found out before a move asks for more.

#[path = "../common/mod.rs"]
mod common;
mod daemon;
mod destination;
mod impostor;
mod settings;
mod source;
mod taking;

use common::qemu;
