//! [`ReturnsValue`]: the one shape of ioctl for which rustix has no pattern, where the return value is the answer.

use std::ffi::c_void;

use rustix::io::Result;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

/// An ioctl whose argument is a number or a pointer, and whose return value is the answer: a count or a descriptor.
pub(crate) struct ReturnsValue<const OPCODE: Opcode> {
    argument: *mut c_void,
}

impl<const OPCODE: Opcode> ReturnsValue<OPCODE> {
    /// Returns the ioctl with this argument.
    ///
    /// # Safety
    ///
    /// `OPCODE` must be a valid ioctl for the descriptor that it will be used on, and `argument` must be what it
    /// expects: a number, or a pointer to what it reads and writes that stays valid, and is not otherwise
    /// borrowed, until the call returns.
    pub(crate) unsafe fn new(argument: *mut c_void) -> Self {
        Self { argument }
    }
}

// SAFETY: the caller of `new` vouched for opcode and argument; the output is the plain return value.
unsafe impl<const OPCODE: Opcode> Ioctl for ReturnsValue<OPCODE> {
    type Output = IoctlOutput;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<IoctlOutput> {
        Ok(output)
    }
}
