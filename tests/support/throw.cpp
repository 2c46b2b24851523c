// Dies of an exception that nobody catches: throw [MEGABYTES].
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct Order {
    std::string name;
    void ship() const { throw std::runtime_error("no such order: " + name); }
};

int main(int argc, char **argv)
{
    std::vector<unsigned> memory((argc > 1 ? std::atoi(argv[1]) : 0) << 18);
    std::mt19937 random;
    for (auto &word : memory)
        word = random();
    Order order{"blue"};
    order.ship();
}
