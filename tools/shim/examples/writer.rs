//! A program that knows nothing of Memlane, for the tests: maps a file, shared, and writes the
//! pages whose numbers it reads from stdin. It answers each with the number, once it is written.

use std::error::Error;
use std::fs::OpenOptions;
use std::io::stdin;
use std::ptr::null_mut;

use rustix::mm::{MapFlags, ProtFlags, mmap};

const PAGE_BYTES: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: writer FILE")?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let bytes = usize::try_from(file.metadata()?.len())?;
    // SAFETY: a new mapping, which nothing else in this program refers to.
    let memory =
        unsafe { mmap(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)? };
    println!("mapped");
    for line in stdin().lines() {
        let page: usize = line?.parse()?;
        if page >= bytes / PAGE_BYTES {
            return Err(format!("page {page} lies outside of the file").into());
        }
        // SAFETY: the page lies in the mapping, which lives as long as the program.
        unsafe { memory.cast::<u8>().add(page * PAGE_BYTES).write_volatile(1) };
        println!("{page}");
    }
    Ok(())
}
