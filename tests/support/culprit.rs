// Dies of a panic that aborts, some frames deep, with threads and 30 MB.
use std::{process, thread};

struct Order {
    name: Option<String>,
}

#[inline(never)]
fn ship(order: &Order, depth: usize) -> usize {
    if depth > 0 {
        return ship(order, depth - 1) + 1;
    }
    order.name.as_ref().expect("no such order").len()
}

fn main() {
    let mut state = 88172645463325252u64;
    let memory: Vec<u64> = (0..4 << 20)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        })
        .collect();
    for _ in 0..8 {
        thread::spawn(thread::park);
    }
    let sum = ship(&Order { name: None }, 10) + memory.len();
    process::exit(sum as i32);
}
