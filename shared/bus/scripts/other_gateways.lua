-- Prelude: `other_gateways` returns the gateways that a record names, except one.
local function other_gateways(record, gateway)
  local names = {}
  for name in string.gmatch(redis.call('HGET', record, 'gateways') or '', '%S+') do
    if name ~= gateway then names[#names + 1] = name end
  end
  return names
end
