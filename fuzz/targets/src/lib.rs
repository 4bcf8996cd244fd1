//! What holds for every decoder of Memlane, whatever the bytes.
//!
//! Each function takes bytes as a stranger may send or write them, decodes them, and panics if something does not hold
//! that must: what was decoded is encoded to bytes that mean the same, lengths are within their bounds, and text can be
//! shown on a terminal. `fuzz/fuzz_targets/` calls them with bytes that libFuzzer makes up, and a test of this crate with
//! the files of `fuzz/corpus/`.

#![forbid(unsafe_code)]

mod api;
mod attach;
mod config;
mod control;
mod frame;
mod guest_file;
mod hello;
mod journal;
mod qmp;
mod starter;
mod state;
mod text;
mod tls;

pub use api::api;
pub use attach::attach;
pub use config::config;
pub use control::control;
pub use frame::frame;
pub use guest_file::guest_file;
pub use hello::hello;
pub use journal::journal;
pub use qmp::qmp;
pub use starter::starter;
pub use state::state;
pub use tls::tls;

/// A target: its name, and the function that takes its bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 12] = [
    ("hello", hello),
    ("control", control),
    ("frame", frame),
    ("attach", attach),
    ("starter", starter),
    ("state", state),
    ("qmp", qmp),
    ("guest_file", guest_file),
    ("config", config),
    ("journal", journal),
    ("api", api),
    ("tls", tls),
];
