#!/bin/sh
# Runs after state.sh in the machine that tests/deploy/test_walk.py boots. The test reads the lines that begin with a
# word in capitals.
foreign='|/bin/true %P'
left() { # every file that is not the kernel's, the log's or the walk's own
    find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /dev -o -path /tmp -o -path /checkout \
        -o -path /root -o -path /var/log -o -path /var/lib/systemd -o -name __pycache__ \) -prune -o -print | sort
}
stored() { # N: wait until the bucket has so many dumps
    for _ in $(seq 600); do
        found=$(/checkout/.venv/bin/python /count.py 2>/dev/null)
        [ "$found" = "$1" ] && break
        sleep 0.5
    done
    echo "STORED $found"
}
crash() { systemctl start crashy.service; }
taken() { # TAG: another program takes the pattern; who has it some seconds later?
    echo "$foreign" >/proc/sys/kernel/core_pattern
    for _ in $(seq 40); do
        grep -q core-dump-helper /proc/sys/kernel/core_pattern && break
        sleep 0.5
    done
    state "$1"
}
setup=/usr/libexec/core-dump-handler/core-dump-setup
export HOME=/root AWS_ENDPOINT_URL=http://127.0.0.1:5555 AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x
export AWS_REGION=us-east-1 BUCKET_NAME=my-bucket PYTHONDONTWRITEBYTECODE=1
sed 's/^/AT_BOOT /' /proc/sys/kernel/core_pattern
/checkout/.venv/bin/moto_server -p 5555 >/tmp/moto.log 2>&1 &
until /checkout/.venv/bin/python /count.py make >/dev/null 2>&1; do sleep 1; done
mkdir -p /opt
left >/tmp/before
run INSTALLED /checkout/sysctl/install.sh
make -s -C /checkout run BUCKET_NAME=my-bucket >/tmp/collector.log 2>&1 &
crash; stored 1
cp -a /checkout/helper /checkout/sysctl /tmp/
sed -i 's/^VERSION = .*/VERSION = "0.2.0"/' /checkout/helper/core_dump_helper/__init__.py
run UPGRADED /checkout/sysctl/install.sh
echo "VERSION $(/usr/libexec/core-dump-handler/core-dump-helper --version)"
crash; stored 2
cp -a /tmp/helper /tmp/sysctl /checkout/
run DOWNGRADED /checkout/sysctl/install.sh
echo "VERSION $(/usr/libexec/core-dump-handler/core-dump-helper --version)"
crash; stored 3
pkill -f core-dump-collector
ln -s /checkout/.venv /opt/core-dump-handler
env | grep -E '^(AWS_|BUCKET_)' >/etc/core-dump-handler/collector.env
cp /checkout/sysctl/core-dump-collector.service /etc/systemd/system/
systemctl daemon-reload && systemctl start core-dump-collector
run MOVED $setup activate --watch-dir /data/cores
crash; stored 4
systemctl show -p Environment -p ActiveState -p NRestarts core-dump-collector | sed 's/^/UNIT /'
run BACK $setup activate --watch-dir /core_dumps
crash; stored 5
systemctl stop core-dump-collector
rm /etc/systemd/system/core-dump-collector.service /opt/core-dump-handler /etc/core-dump-handler/collector.env
run REMOVED /checkout/sysctl/uninstall.sh
left >/tmp/after
diff /tmp/before /tmp/after | sed -n 's/^[<>]/REMAINS &/p'
crash
for _ in $(seq 60); do ls /var/lib/systemd/coredump/core.sh.* >/dev/null 2>&1 && break; sleep 0.5; done
find /var/lib/systemd/coredump -name "core.sh.*" | wc -l | sed "s/^/SYSTEMD /"
echo REASSERT=yes >>/etc/core-dump-handler/helper.conf
mkdir -p /etc/systemd/system/core-dump-reassert.timer.d
cd /etc/systemd/system/core-dump-reassert.timer.d || exit
printf '[Timer]\nOnBootSec=1\nOnUnitInactiveSec=1\nAccuracySec=1\n' >fast.conf
run AGAIN /checkout/sysctl/install.sh --no-test
systemctl is-active core-dump-reassert.timer | sed 's/^/TIMER /'
for _ in 1 2 3 4; do taken GIVEN; done
journalctl -b -u core-dump-reassert --no-pager -o cat | grep -c 'something else took' | sed 's/^/JOURNAL /'
systemctl start stopping.service
echo THE END
systemctl poweroff
sleep 60
