//! [`Mover`]: the program that moves the guest.

use std::time::Duration;

use crate::baseline::qemu::QemuMethod;
use crate::report::{Case, Contender};

/// The longest wait for anything that is not measured.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// The program that moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mover {
    Daemons,
    Qemu(QemuMethod),
}

impl Mover {
    pub(super) fn case(self) -> Case {
        match self {
            Self::Daemons => Contender::Memlane.case("linux"),
            Self::Qemu(way) => Contender::Qemu.case(way.to_string()),
        }
    }
}
