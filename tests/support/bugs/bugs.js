// Usage: node bugs.js BUG MIB: touch so many MiB of memory, then fail in one of several ways.
const [bug, mib] = process.argv.slice(2).map(Number);
const memory = [];
for (let n = 0; n < mib; n++) memory.push(Buffer.alloc(1 << 20, 7));
if (bug === 0) process.abort();
if (bug === 1) { const all = []; for (;;) all.push(new Array(1 << 16).fill(bug)); }
if (bug === 2) process.kill(process.pid, "SIGSEGV");
if (bug === 3) { const all = {}; setImmediate(() => { process.abort(); }); }
if (bug === 4) process.dlopen({ exports: {} }, process.env.BUGS_ADDON);
