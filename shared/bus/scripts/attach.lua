-- Add a gateway to the readers of answers.
-- KEYS: record...
-- ARGV: gateway
-- requires: other_gateways
-- requires: typed
for _, record in ipairs(KEYS) do
  if is_a('hash', record) then
    local names = other_gateways(record, ARGV[1])
    names[#names + 1] = ARGV[1]
    redis.call('HSET', record, 'gateways', table.concat(names, ' '))
  end
end
