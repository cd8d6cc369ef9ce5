//! Guests of a few instructions: they say a word on the serial port and end in some way.
//!
//! They run in the mode in which PVH enters a kernel (32 bits, no paging, no interrupts), which also those KVMs can do that
//! cannot run an unmodified kernel.

/// Where the program lies, and is entered.
const BASE: u32 = 1 << 20;
/// Where it lies in the file, after the headers and the note.
const OFFSET: usize = 0x100;

/// What a guest does in the end.
#[derive(Clone, Copy, Debug)]
pub enum Then {
    /// Writes to a port: the machine's registers for power-off, restart, panic.
    Out(u16, u8),
    /// An exception without a table of handlers, so that the handlers of that fail, too.
    TripleFault,
    /// Nothing, for ever.
    Halt,
    /// Sends back what it receives, for ever.
    Echo,
}

pub const POWER_OFF: Then = Then::Out(0x600, 5 << 2 | 1 << 5);
pub const RESTART: Then = Then::Out(0x604, 1);
pub const PANIC: Then = Then::Out(0x505, 1);

/// `mov dx, port`
fn port(port: u16) -> [u8; 4] {
    let [low, high] = port.to_le_bytes();
    [0x66, 0xba, low, high]
}

/// A kernel, an ELF file with an entry for PVH, that says `text` and ends in the way `then`.
pub fn kernel(text: &str, then: Then) -> Vec<u8> {
    let mut code = port(0x3f8).to_vec();
    for byte in text.bytes() {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
    match then {
        Then::Out(to, value) => {
            code.extend(port(to));
            code.extend([0xb0, value, 0xee]);
        }
        Then::TripleFault => {
            // lidt [table]; ud2; table: no bytes at no address
            let table = BASE + code.len() as u32 + 9;
            code.extend([0x0f, 0x01, 0x1d]);
            code.extend(table.to_le_bytes());
            code.extend([0x0f, 0x0b, 0, 0, 0, 0, 0, 0]);
        }
        Then::Echo => {
            // Interrupts for received data are on: before that the port keeps back what is typed.
            code.extend(port(0x3f9));
            code.extend([0xb0, 1, 0xee]);
            let start = code.len();
            code.extend(port(0x3fd));
            // in al, dx; test al, 1; jz start
            code.extend([0xec, 0xa8, 0x01, 0x74]);
            code.push((start as i32 - code.len() as i32 - 1) as u8);
            code.extend(port(0x3f8));
            // in al, dx; out dx, al; jmp start
            code.extend([0xec, 0xee, 0xeb]);
            code.push((start as i32 - code.len() as i32 - 1) as u8);
        }
        Then::Halt => {}
    }
    // again: cli; hlt; jmp again
    code.extend([0xfa, 0xf4, 0xeb, 0xfc]);
    elf(&code)
}

/// ELF-64 Object File Format 1.5, with the note XEN_ELFNOTE_PHYS32_ENTRY (18) that names the entry.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; OFFSET];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64.
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &u64::from(BASE).to_le_bytes());
    // Two program headers of 56 bytes after this one of 64.
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    let mut header = |at: usize, kind: u32, flags: u32, numbers: [u64; 6]| {
        put(at, &kind.to_le_bytes());
        put(at + 4, &flags.to_le_bytes());
        for (i, number) in numbers.iter().enumerate() {
            put(at + 8 + 8 * i, &number.to_le_bytes());
        }
    };
    let (base, bytes) = (u64::from(BASE), code.len() as u64);
    header(64, 1, 7, [OFFSET as u64, base, base, bytes, bytes, 4096]);
    header(120, 4, 4, [0xc0, 0, 0, 20, 20, 4]);
    put(0xc0, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0xcc, b"Xen\0");
    put(0xd0, &BASE.to_le_bytes());
    file.extend(code);
    file
}
