// Usage: bugs BUG MIB: touch so many MiB of memory, then fail in one of several ways.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define APART __attribute__((noinline, noclone))

volatile int zero;
volatile std::size_t sink;

struct Shape {
    virtual ~Shape() = default;
    virtual int area() = 0;
};
struct Square : Shape {
    int *side = nullptr;
    APART int area() override { return *side + 1; }
};
struct Circle : Shape {
    int *radius = nullptr;
    APART int area() override { return *radius * 3; }
};

APART int total(const std::vector<std::unique_ptr<Shape>> &shapes)
{
    int sum = zero;
    for (const auto &shape : shapes)
        sum += shape->area();
    return sum;
}
APART void read_header() { throw std::runtime_error("header"); }
APART void read_footer() { throw std::runtime_error("footer"); }
APART void read_file() { read_header(); sink = sink + 1; }
APART void read_archive() { read_footer(); sink = sink + 2; }
APART int at(const std::vector<int> &values) { return values.at(values.size() + zero); }
APART int look_up(const std::map<std::string, int> &names) { return names.at("nobody"); }
APART void sort_badly()
{
    std::vector<int> values(100, 3);
    int *volatile nowhere = nullptr;
    std::sort(values.begin(), values.end(), [&](int a, int b) { return a + *nowhere < b; });
    sink = values[0];
}
APART void call(const std::function<void()> &function) { function(); sink = sink + 3; }
APART void fail_in_thread()
{
    std::thread([] { throw std::logic_error("thread"); }).join();
}
APART void stop() noexcept { read_header(); }

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    std::vector<char> memory((std::strtoul(words[2], nullptr, 10) << 20) + 1, 7);
    sink = memory[zero];
    std::vector<std::unique_ptr<Shape>> shapes;
    switch (std::atoi(words[1])) {
    case 0: shapes.push_back(std::make_unique<Square>()); sink = total(shapes); break;
    case 1: shapes.push_back(std::make_unique<Circle>()); sink = total(shapes); break;
    case 2: read_file(); break;
    case 3: read_archive(); break;
    case 4: sink = at({1, 2, 3}); break;
    case 5: sink = look_up({}); break;
    case 6: sort_badly(); break;
    case 7: call({}); break;
    case 8: fail_in_thread(); break;
    case 9: stop(); break;
    }
    return 1;
}
