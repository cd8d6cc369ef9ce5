//! Runs a machine with its serial port on standard input and output.
//!
//! `boot KERNEL [--initrd FILE] [--cmdline TEXT] [--mem MIB] [--cpus N] [--disk SOCKET]... [--escape] [--no-input]`, or `boot --probe`
//!
//! It ends with status 0 where the guest powered off, 10 for a reboot, 11 for a panic, 12 for a crash, 13 where it was
//! stopped, 1 for an error.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use sapwood_vmm::event::Event;
use sapwood_vmm::{Config, Console, Disk, Ending};

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("which kernel?")?;
    if kernel == "--probe" {
        sapwood_vmm::probe::probe()?;
        return Ok(0);
    }
    let mut config = Config {
        memory_bytes: 256 << 20,
        cpus: 1,
        kernel: File::open(kernel)?,
        initrd: None,
        cmdline: String::new(),
        disks: Vec::new(),
        console: Console {
            input: Some(std::io::stdin().as_fd().try_clone_to_owned()?.into()),
            output: std::io::stdout().as_fd().try_clone_to_owned()?.into(),
            escape: false,
        },
    };
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{option} of what?"));
        match option.as_str() {
            "--initrd" => config.initrd = Some(File::open(value()?)?),
            "--cmdline" => config.cmdline = value()?,
            "--mem" => config.memory_bytes = value()?.parse::<u64>()? << 20,
            "--cpus" => config.cpus = value()?.parse()?,
            "--disk" => config.disks.push(Disk { socket: value()?.into() }),
            "--escape" => config.console.escape = true,
            "--no-input" => config.console.input = None,
            _ => return Err(format!("what is {option}?").into()),
        }
    }
    let stop = Event::new()?;
    let ending = sapwood_vmm::run(config, stop.as_fd())?;
    eprintln!("boot: {ending:?}");
    Ok(match ending {
        Ending::PowerOff => 0,
        Ending::Reboot => 10,
        Ending::Panic => 11,
        Ending::Crash => 12,
        Ending::Stopped => 13,
    })
}
