//! What `cargo xtask torture` and `cargo xtask soak` have in common: both order guests to move, have something go wrong
//! meanwhile, and find out from VMMs, daemons and records what has become of it.

pub(crate) mod api;
pub(crate) mod ask;
pub(crate) mod dice;
pub(crate) mod files;
pub(crate) mod options;
pub(crate) mod order;
pub(crate) mod record;
pub(crate) mod signal;
