//! Trees of Debian: the files of a system, unpacked into cargo's target directory and kept there.
//!
//! Labs with a Linux of their own are made of them. They come from the archive that this machine's apt is configured
//! for, and a tree does not name that.

mod archive;
mod bootstrap;
mod host;
mod tree;

pub(crate) use bootstrap::{Bootstrap, install_tools};
pub use tree::Tree;
